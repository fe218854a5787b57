"""Figures and how sure they are, as pure functions on arrays.

metrics.py     AUC, F1, TPR at a low FPR, IoU
intervals.py   bootstrap over clusters, exact intervals of shares
thresholds.py  thresholds from clean captions
null.py        the distribution of a measure where nothing is copied, and p-values under it
multiple.py    q-values: how many of many verdicts are expected to be false
"""
