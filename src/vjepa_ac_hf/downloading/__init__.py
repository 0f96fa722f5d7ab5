"""From an index file or a data set on the Hub to checked recordings on disk (docs/data.md, "Downloading").

`index` says which recordings there are, `transfer` fetches one file, `recordings` all of them. Open `recordings.py`
first.
"""
