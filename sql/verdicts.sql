-- What did confirm decide, with what scores and how close were the matches?
SELECT
    verdict,
    count(*) AS captions,
    min(candidate_score) AS lowest_score,
    median(candidate_score) AS median_score,
    median(best.sscd) AS median_sscd,
    median(best.correlation_distance) AS median_correlation_distance,
    max(p_value) AS highest_p_value,
    max(q_value) AS highest_q_value,
    count(*) FILTER (best.own) AS own_picture
FROM confirmed
GROUP BY verdict
ORDER BY captions DESC, verdict;
