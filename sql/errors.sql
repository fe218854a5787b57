-- What failed, how often, and where is an example: rows with an error, trajectories, and tries of whole shards?
SELECT 'row' AS what, error, count(*) AS times, min(row_id) AS example
FROM scores WHERE status = 'error' GROUP BY error
UNION ALL
SELECT stage || ' trajectory', error, count(*), min(row_id) FROM trajectories WHERE error IS NOT NULL GROUP BY stage, error
UNION ALL
SELECT stage || ' shard', error, count(*), min(shard) FROM attempts GROUP BY stage, error
ORDER BY times DESC, what, error;
