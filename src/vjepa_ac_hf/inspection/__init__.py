"""From a built data set and its recordings to pages and numbers for people (docs/data.md, "Looking at clips").

`columns` reads single columns and rows, `events` chooses clips worth looking at, `clip_picture` draws one, `preview`
makes the page of them; `summary` counts actions and writes the data-set report; `labels` has what a head told beside
what was logged, and the index of all pages. Open `summary.py` first.
"""
