"""From recordings to a data set of clips in Parquet, or to rows as they are asked for (docs/data.md).

`vpt_tubelets` is the builder of `load_dataset`, `selection` what is left out, `rows` one recording's rows and the
report; `plan`, `tasks`, `local`, `cluster` and `merging` build a data set in pieces, on any number of machines.
Open `rows.py` first.
"""
