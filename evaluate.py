"""Judge an edit: `python evaluate.py --config edit.toml`, any tool's output by its files, or the method: `--suite scenes`."""

from __future__ import annotations

import sys

from loraedit_ext import cli

REQUIRED = ("source", "edited", "mask", "reference", "out")
OPTIONAL = ("generated", "truth")
HELP = {
    "source": "video or folder of images that was edited", "edited": "the result",
    "mask": "white = edit: video, folder, or one picture for all frames", "reference": "the edited first frame",
    "out": "folder for evaluation.json and report.html", "generated": "the result before compositing, if there is one",
    "truth": "what the edit should be, if that is known",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    parser = cli.parser("Judge an edit against its source, mask and edited first frame.", config_required=False)
    parser.add_argument("--edit", type=cli.path, metavar="FOLDER", help="with --config: edit to judge; default: the newest")
    for name in (*REQUIRED, *OPTIONAL):
        parser.add_argument(f"--{name}", type=cli.path, metavar="PATH", help=HELP[name])
    parser.add_argument("--suite", choices=["scenes"], help="run the benchmark; its knobs are suite.KEY=value")
    parser.add_argument("--quick", action="store_true", help="with --suite: a subset that takes a few minutes")
    options = parser.parse_intermixed_args(arguments)
    given = {name: getattr(options, name) for name in (*REQUIRED, *OPTIONAL) if getattr(options, name)}
    if options.suite and (options.config or options.edit or given.keys() - {"out"}):
        parser.error("--suite makes its own edits; it goes with --quick, --out and key=value alone")
    if options.quick and not options.suite:
        parser.error("--quick goes with --suite")
    if options.config and given.keys() - {"out"}:
        parser.error("--config brings its own files; leave out --" + ", --".join(given.keys() - {"out"}))
    if not options.config and not options.suite and (missing := [name for name in REQUIRED if name not in given]):
        parser.error("give --config, or all of --" + ", --".join(REQUIRED) + "; missing: --" + ", --".join(missing))
    if options.edit and not options.config:
        parser.error("--edit goes with --config")

    def run() -> None:
        from loraedit_ext.evaluation.run import evaluate_edit, evaluate_files
        from loraedit_ext.evaluation.subject import Files

        if options.suite:
            from loraedit_ext.evaluation.suite.run import run_suite

            run_suite(options.overrides, options.quick, options.out)
        elif options.config:
            evaluate_edit(cli.read_config(options), options.config, options.edit, options.out)
        else:
            out = given.pop("out")
            evaluate_files(Files(**given), cli.read_evaluation(options), out)

    return cli.guarded(run, options.traceback)


if __name__ == "__main__":
    sys.exit(main())
