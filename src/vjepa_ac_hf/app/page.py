"""The page, served by Gradio (extra `app`): its own HTML and script, whose requests `Explorer` answers."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .explorer import Answer, Explorer

HERE = Path(__file__).parent
REQUESTS = (*("hello", "alive", "choose", "drop", "act", "undo", "restart", "mirror", "clear", "plan", "film", "log"),)


def server_function(explorer: Explorer, name: str) -> Callable[[Any], Answer]:
    """What Gradio calls when the page's script calls `server.<name>(request)`."""

    def ask(request: Any) -> Answer:
        return explorer.answer(name, request)

    ask.__name__ = name
    return ask


def make_page(explorer: Explorer, title: str) -> Any:
    """The page as Gradio's `Blocks`. Nothing in it comes from elsewhere: no fonts, no analytics."""
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            html_template=(HERE / "page.html").read_text(),
            css_template=(HERE / "page.css").read_text(),
            js_on_load=(HERE / "page.js").read_text(),
            server_functions=[server_function(explorer, name) for name in REQUESTS],
        )
    return page


def launch(explorer: Explorer, *, host: str, port: int | None, title: str = "vjepa-ac-hf") -> Any:
    """Serve the page, in threads of its own.

    Args:
        explorer: answers it.
        host: address to bind to.
        port: None: the first free one from 7860 on.
        title: of the page.

    Returns:
        Gradio's app, the page's address, and its `Blocks`: `block_thread()` waits for Ctrl-C, `close()` ends it.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the port is taken.
    """
    import gradio as gr

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    page = make_page(explorer, title)
    app, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        max_file_size=explorer.limits.upload_bytes,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        state_session_capacity=4 * explorer.limits.sessions,
        theme=gr.themes.Base(font=fonts[0], font_mono=fonts[1]),
    )
    return app, address, page


def uploads_folder() -> Path:
    """An empty folder for what visitors upload, which Gradio is told of; it goes when the program ends."""
    folder = tempfile.mkdtemp(prefix="vjepa-ac-uploads-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    os.environ["GRADIO_TEMP_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
