"""Stores in; heads, numbers and a report out.

Only fine-tuning, `predict` and the report's thumbnails open images. To read, in this order: data
and splits (rows of a store, dealt into folds), heads (over solve/), choose (C on folds), tested and
results (over score/: what a result is), identity (what tells two apart), probing and sweep (from a
store to results), compare, report/; cells and grid put all of it together.
"""
