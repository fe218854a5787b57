"""How well scores and verdicts tell memorised captions from clean ones, by labels.

config.py    `be-audit evaluate`: which run, which labels
labels.py    labels from a file, joined to the captions of a run
series.py    every score a run holds of labelled captions
evaluate.py  every metric of every score, with intervals; tables
plots.py     ROC curves and distributions
"""
