"""Put the page of `explore.py` on the Hub: a Space that runs on a free CPU.

    python examples/push_space.py --model OUT_OR_REPO --dataset DIR_OR_REPO --output FOLDER [--space ORG/NAME]

FOLDER runs as it is (`pip install -r requirements.txt`, `python app.py`); with --space it is pushed. Models and
decoders that are folders are copied in, those on the Hub are loaded from there; some clips are copied in.
"""

import argparse
from pathlib import Path

from vjepa_ac_hf.console import Parser, folder_or_repo, made


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=folder_or_repo, required=True, help="folder or Hub repository")
    parser.add_argument("--dataset", type=folder_or_repo, required=True, help="folder or Hub repository of built clips")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, empty or new")
    parser.add_argument("--decoder", type=folder_or_repo, help="a VJEPA2ACForFrameDecoding of the model's features")
    parser.add_argument("--evaluation", type=Path, help="folder of evaluate.py (default: the model's own figures)")
    parser.add_argument("--split", default="validation", help="whose clips (default: validation)")
    parser.add_argument("--clips", type=int, default=24, help="clips to copy in, evenly spaced (default: 24)")
    parser.add_argument("--title", help="of the Space (default: the Space's or the folder's name)")
    parser.add_argument("--space", help="ORG/NAME to push to; without it nothing leaves this machine")
    parser.add_argument("--hub_private", action="store_true", help="create the Space as private")
    parser.add_argument("--hub_timeout", type=float, default=60.0, help="seconds of silence until a request fails")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

from vjepa_ac_hf.app.space import push_space, write_space
from vjepa_ac_hf.records import command_line


def main() -> None:
    args = parse_arguments()
    title = args.title or (args.space or str(args.output.resolve())).rsplit("/", 1)[-1]
    files = write_space(
        args.output,
        title=title,
        model=args.model,
        dataset=args.dataset,
        decoder=args.decoder,
        evaluation=args.evaluation,
        split=args.split,
        clips=args.clips,
        command=command_line(),
    )
    where: str | Path = args.output
    if args.space:
        where = push_space(args.output, args.space, private=args.hub_private, timeout=args.hub_timeout)
    print(made("space", where, {"files": len(files)}))


if __name__ == "__main__":
    main()
