"""DuckDB queries over a run, one question a file; `be-audit sql NAME RUN` runs them."""
