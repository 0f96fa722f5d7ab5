"""A page to play in: a clip, keys, and what the model imagines of them (docs/explore.md).

`scenes` makes of a data set's clip or of a dropped video what a story begins with, `story` imagines step by step,
`goals` finds a way to a frame, `explorer` keeps the stories of all visitors within bounds and answers what the page
asks, `page` shows it with Gradio (extra `app`), `space` puts it on the Hub as a Space. Open `story.py` first.
"""
