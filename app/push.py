"""`turbodistill push`: a student to the Hugging Face hub, with a page that says how to use it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .arguments import folder, place


def command(commands: Any) -> None:
    """Add `push` to the command line's subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser("push", help="upload a student to the Hugging Face hub")
    parser.add_argument("student", type=place, help="student file, or a folder of `turbodistill export --to diffusers`")
    parser.add_argument("repo", help="owner/name on the hub; it is made if there is none")
    parser.add_argument(
        "--license", required=True, help="the hub's short name of a licence that the base allows, such as openrail++"
    )
    parser.add_argument("--base-model", default="", help="owner/name of the base model on the hub")
    parser.add_argument("--grid", type=place, help="picture for the page (default: the run's newest preview)")
    parser.add_argument("--base", type=place, help="base model on disk: a LoRA of a transformer needs it for diffusers")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument(
        "--revision", default="", help="branch to commit to; it is made if there is none (default: main)"
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--token", help="the hub's token (default: that of HF_TOKEN or `hf auth login`)")
    parser.add_argument("--dry-run", action="store_true", help="upload nothing: print and write what would be uploaded")
    parser.add_argument("--out", type=folder, help="folder that --dry-run writes (default: the repository's name)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Upload, or show what would be; 0 when it is there."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the upload needs {error.name}: pip install huggingface-hub") from None
    from ..generate.export.tensors import ExportError
    from ..generate.hub import push

    if args.out and not args.dry_run:
        raise ExportError("--out belongs to --dry-run")
    with push.prepared(args.student, args.repo, args.license, args.base_model, args.grid, args.base) as upload:
        for remark in upload.remarks:
            print(f"turbodistill: {remark}", file=sys.stderr)
        for name, size in upload.sizes().items():
            print(f"{size / 1e6:10.3f} MB  {name}")
        if args.dry_run:
            out = args.out or push.default_folder(args.repo)
            push.write(upload, out)
            print(f"nothing was uploaded; it would be this: {out}")
        else:
            print(push.push(upload, args.token, args.private, args.revision, args.create_pr))
    return 0
