-- Which captions are the most suspicious, what was decided about them, and where do they come from?
SELECT s.row_id, s.excess, s.ld_energy, s.ld, s.magnitude, c.verdict, c.best.sscd AS sscd, s.caption, s.source_url
FROM scores s
LEFT JOIN confirmed c USING (row_id)
WHERE s.status = 'ok' AND s.duplicate_of IS NULL
ORDER BY default_score(s) DESC, s.row_id
LIMIT 100;
