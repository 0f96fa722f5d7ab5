"""What all pages and figures share: style, pictures inside the page, Matplotlib where it is installed."""

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2733; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
section { background: white; border: 1px solid #e2e6ea; border-radius: 10px; padding: 1.2rem 1.4rem; margin: 1.2rem 0; }
.facts { color: #56636f; margin: 0; } .verdict p { margin: .4rem 0; }
.note { border-left: 4px solid #E69F00; padding-left: .8rem; }
.scroll { overflow-x: auto; } img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #e8ebee; white-space: nowrap; }
th { font-weight: 600; } tr:first-child th { white-space: normal; } td small { color: #6b7883; display: block; }
figure { margin: 0 0 1.6rem; } figcaption, dd { color: #56636f; font-size: .9rem; } dt { font-weight: 600; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #56636f; }
.film img { width: 720px; } .film div { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; }
.film div { max-width: 720px; margin: 0 auto; text-align: center; font-size: .8rem; color: #56636f; }
code { background: #eef1f4; border-radius: 4px; padding: .1rem .3rem; font-size: .85rem; overflow-wrap: anywhere; }
"""


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of width x height inches, outside of pyplot's global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's figures need matplotlib: pip install 'vjepa-ac-hf[report]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def image_tag(base64_bytes: str, alternative: str, kind: str = "png") -> str:
    """A picture inside the page, with the text that stands for it."""
    return f'<img src="data:image/{kind};base64,{base64_bytes}" alt="{html.escape(alternative)}">'
