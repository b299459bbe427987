"""A run on its own test data, or a model of any kind on other data or on a suite."""

from pathlib import Path

from threetowers.commands.arguments import EvaluateArguments, part_of_work
from threetowers.errors import UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.evaluate.ranked import Rankings
from threetowers.evaluate.suite.differences import leading, model_differences, write_differences
from threetowers.evaluate.suite.features import is_foreign
from threetowers.evaluate.suite.rows import TABLE, read_rows
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import DataSet, read_suite
from threetowers.run.setup import pick_device


def evaluate(arguments: EvaluateArguments) -> None:
    """Evaluates a model and prints its figures.

    A run without a suite is evaluated as `evaluate_run` does; every other case is a suite, whose tables are in `out`.
    Raises UsageError where nothing says on which data, and what these functions raise.
    """
    target, data, classes, suite = arguments.target, arguments.data, arguments.classes, arguments.suite
    ranked = Rankings(arguments.out / "ranked", arguments.ranked) if arguments.ranked else None
    if suite is None and not is_foreign(target):
        print(evaluate_run(Path(target), data=data, classes=classes, ranked=ranked).text())
        return
    given = [DataSet(name, path) for name, path in (("data", data), ("classes", classes)) if path is not None]
    if (suite is None) == (not given):
        raise UsageError(
            f"evaluate {target}: say on what, with --suite FILE or --suite shapes, or with --data and --classes"
        )
    sets = given if suite is None else read_suite(suite)
    try:
        evaluate_suite(
            target, sets, arguments.out, part=part_of_work(arguments.part), device=pick_device(arguments.device),
            workers=arguments.workers, ranked=ranked,
        )  # fmt: skip
    finally:  # what failed does not hide the rest
        found = model_differences(arguments.out, read_rows(arguments.out))
        if found:
            write_differences(arguments.out, found)
            print("\n".join(each.in_words() for each in leading(found)))
    print(f"table: {arguments.out / TABLE}")
