-- How fast was every worker in every stage? (Rows a second of its own time; duplicates cost nothing and count as rows.)
SELECT
    stage, host, pid, rank,
    count(*) AS shards,
    sum("rows")::BIGINT AS "rows",
    sum(wall_seconds) AS wall_seconds,
    sum("rows") / nullif(sum(wall_seconds), 0) AS rows_per_second,
    min(finished) AS first_finished,
    max(finished) AS last_finished
FROM commits
GROUP BY stage, host, pid, rank
ORDER BY stage, rows_per_second DESC, host, pid;
