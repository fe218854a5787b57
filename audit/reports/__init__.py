"""What a run found, for people and machines.

report.py      `be-audit report`: the folder
flagged.py     which rows it is about
groups.py      captions of one template are one finding
facts.py       what its first screen says
html.py        the page; pictures.py: what an opened row shows
statement.py   a section of a model card, and the same as JSON
export.py      the same rows as parquet, JSONL and CSV
drop.py        `be-audit drop`: a caption table without what was found
sql.py         `be-audit sql`: questions to a run
dictionary.py  docs/data-dictionary.md, from the columns
"""
