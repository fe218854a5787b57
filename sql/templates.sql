-- Which openings (the first two words, numbers alike) do many captions share, and how do their scores compare?
SELECT
    regexp_extract(regexp_replace(lower(caption), '[0-9]+', '0', 'g'), '^[^\p{L}\p{N}]*([\p{L}\p{N}]+[^\p{L}\p{N}]+[\p{L}\p{N}]+)', 1) AS opening,
    count(*) AS captions,
    avg(ld_energy) AS mean_ld_energy,
    max(ld_energy) AS max_ld_energy,
    arg_max(caption, ld_energy) AS highest
FROM scores
WHERE status = 'ok' AND duplicate_of IS NULL
GROUP BY opening
HAVING count(*) >= 3 AND opening <> ''
ORDER BY mean_ld_energy DESC, opening
LIMIT 50;
