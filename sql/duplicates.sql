-- Do captions that occur more often in the data score higher?
WITH caption AS (
    SELECT coalesce(duplicate_of, row_id) AS first_row, count(*) AS occurrences, any_value(ld_energy) AS ld_energy
    FROM scores
    WHERE status = 'ok'
    GROUP BY first_row
)
SELECT occurrences, count(*) AS captions, avg(ld_energy) AS mean_ld_energy, median(ld_energy) AS median_ld_energy, max(ld_energy) AS max_ld_energy
FROM caption
GROUP BY occurrences
ORDER BY occurrences;
