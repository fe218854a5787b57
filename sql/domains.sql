-- Which source domains do high-scored and reproduced captions come from? (High: the top 5 percent.)
WITH scored AS (
    SELECT
        coalesce(lower(regexp_extract(s.source_url, '^[a-zA-Z]+://([^/?#]+)', 1)), '') AS domain,
        s.ld_energy,
        s.ld_energy >= (SELECT quantile_cont(ld_energy, 0.95) FROM scores WHERE status = 'ok' AND duplicate_of IS NULL) AS high,
        coalesce(c.verdict IN ('global', 'local'), false) AS reproduced
    FROM scores s
    LEFT JOIN confirmed c ON c.row_id = coalesce(s.duplicate_of, s.row_id)
    WHERE s.status = 'ok'
)
SELECT
    domain,
    count(*) AS "rows",
    count(*) FILTER (high) AS high,
    count(*) FILTER (high) / count(*) AS high_rate,
    count(*) FILTER (reproduced) AS reproduced,
    avg(ld_energy) AS mean_ld_energy
FROM scored
GROUP BY domain
ORDER BY high DESC, "rows" DESC, domain
LIMIT 50;
