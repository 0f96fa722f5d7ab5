"""A page to play in: choose a clip, act by keyboard and mouse, and see what a world model imagines.

    python examples/explore.py --model demo/model --dataset demo/clips [--decoder demo/decoder]

Opens on the loopback address; Ctrl-C ends it. With a decoder (`train_head.py --task frame_decoding`) imagined features
are drawn, without one the nearest real frames stand in. docs/explore.md has the keys, what is kept and what is limited.
"""

import argparse
from pathlib import Path

from vjepa_ac_hf.console import Parser, folder_or_repo


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=folder_or_repo, required=True, help="folder or Hub repository")
    parser.add_argument("--dataset", type=folder_or_repo, required=True, help="folder or Hub repository of built clips")
    parser.add_argument("--decoder", type=folder_or_repo, help="a VJEPA2ACForFrameDecoding of the model's features")
    parser.add_argument("--evaluation", type=Path, help="folder of evaluate.py (default: the model's own figures)")
    parser.add_argument("--split", default="validation", help="whose clips are offered (default: validation)")
    parser.add_argument("--clips", type=int, default=48, help="clips to offer, evenly spaced (default: 48)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    parser.add_argument("--max_upload_mb", type=int, default=200, help="of a dropped video (0: none; default: 200)")
    parser.add_argument("--sessions", type=int, default=32, help="visitors at a time (default: 32)")
    parser.add_argument("--device", help="default: cuda if there is one")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

from vjepa_ac_hf.app.explorer import Limits
from vjepa_ac_hf.app.load import load_explorer
from vjepa_ac_hf.app.page import launch


def main() -> None:
    args = parse_arguments()
    limits = Limits(sessions=args.sessions, upload_bytes=args.max_upload_mb * 2**20)
    explorer = load_explorer(
        args.model,
        args.dataset,
        decoder=args.decoder,
        evaluation=args.evaluation,
        split=args.split,
        clips=args.clips,
        device=args.device,
        limits=limits,
    )
    _, address, page = launch(explorer, host=args.host, port=args.port)
    print(f"page: {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
