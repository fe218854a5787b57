-- How are the scores distributed, in 20 equal bins, and how many captions of each bin were reproduced?
WITH scored AS (
    SELECT row_id, ld_energy FROM scores WHERE status = 'ok' AND duplicate_of IS NULL AND ld_energy IS NOT NULL
), span AS (
    SELECT min(ld_energy)::DOUBLE AS low, greatest(max(ld_energy) - min(ld_energy), 1e-9)::DOUBLE AS width FROM scored
)
SELECT
    least(floor((ld_energy - low) / width * 20), 19)::INTEGER AS bin,
    any_value(low + width * least(floor((ld_energy - low) / width * 20), 19) / 20) AS from_score,
    count(*) AS captions,
    count(*) FILTER (c.verdict IN ('global', 'local')) AS reproduced
FROM scored
CROSS JOIN span
LEFT JOIN confirmed c USING (row_id)
GROUP BY bin
ORDER BY bin;
