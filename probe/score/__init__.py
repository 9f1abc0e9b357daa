"""Score: from what a head predicted of the test images to numbers with intervals and tests.

Labels, log-odds and subjects go in as arrays; scores, intervals and p-values come out. Nothing here
knows a store or fits a head. Every metric takes W weightings of the N images at once, so that a
bootstrap is one call.

To read, in this order: log_odds (what a prediction is), metrics with ranking, agreement and
calibration (the scores; metric_names has their other names), resampling (subjects drawn again),
intervals (of one score), paired with delong (two models on the same images), winner (the best of
several), ranks (many models on many data sets); then predictions (one per image, or per unit), with
caveats, groups, thresholds and evaluation (all that is said of one test set). docs/metrics.md says
what each means.
"""
