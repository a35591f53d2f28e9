"""Write gpu.md, with the goals and a section for each part."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.part import Options, Part, Table
from benchmarks.gpu.process import load
from benchmarks.gpu.records import Record
from kdhooks.evaluation.tables import markdown

HEAD = """# Results on {device}

`python -m benchmarks.gpu` wrote this page, the JSON file of each part and the pictures beside them.
Each part ends with the command that ran it.

{machines}

## Goals

{goals}
"""


def write(parts: Mapping[str, str], options: Options) -> None:
    """Write gpu.md and the pictures of the parts, from all results in the folder."""
    sections, goals = [], [["part", "goal", "found", "met"]]
    machines: list[dict[str, str]] = []
    for name, module in parts.items():
        part, record = load(module), Record(name, options)
        shown = record.shown
        found = {case: entry["result"] for case, entry in shown.items()}
        goals += [
            [name, goal.text, goal.found, "yes" if goal.met else "**no**"]
            for goal in (part.goals(found) if found else ())
        ]
        sections.append(_section(name, part, record, found, options))
        for entry in shown.values():
            if entry["made"]["on"] not in machines:
                machines.append(entry["made"]["on"])
    head = HEAD.format(
        device="a GPU" if options.cuda else "a CPU",
        machines=markdown(_machines(machines)) if machines else "No case has been run.",
        goals=markdown(goals) if len(goals) > 1 else "No part with a goal has been run.",
    )
    text = "\n".join([head, *sections])
    (options.out / "gpu.md").write_text(text, encoding="utf-8")


def _machines(machines: Sequence[Mapping[str, str]]) -> Table:
    """Return a table with a column for each machine."""
    facts = dict.fromkeys(fact for machine in machines for fact in machine)
    rows = [[fact, *(machine.get(fact, "") for machine in machines)] for fact in facts]
    return [["", *(f"machine {number + 1}" for number in range(len(machines)))], *rows]


def _section(
    name: str, part: Part, record: Record, found: Mapping[str, Any], options: Options
) -> str:
    lines = [f"## {name}", "", part.ABOUT.strip(), ""]
    for case, entry in record.cases.items():
        if entry["status"] == "failed":
            last = entry["traceback"].strip().splitlines()[-1]
            lines += [f"- **{case}: failed**: `{last[:300]}`"]
        elif entry["status"] != "done":
            lines += [f"- {case}: {entry['status']}: {entry.get('reason', 'it has not ended')}"]
    left = [case for case in part.cases(options) if case not in record.cases]
    if left:
        lines += [f"- not run: {'; '.join(left)}"]
    if lines[-1]:
        lines.append("")
    if found:
        for table in part.tables(found):
            lines += [markdown(table), ""]
        figure = part.picture(found)
        if figure is not None:
            figure.savefig(options.out / f"{name}.png", dpi=110)
            lines += [f"![{name}]({name}.png)", ""]
        lines += [*_made(record), ""]
    return "\n".join(lines)


def _made(record: Record) -> Iterator[str]:
    """Yield a line for each command: cases may come from several runs, with their time and card."""
    runs: dict[tuple[str, str, str], list[Any]] = {}
    for entry in record.shown.values():
        made = entry["made"]
        key = made["by"], made["on"]["card"], made["on"]["torch"]
        runs.setdefault(key, []).append(entry)
    for (command, card, version), entries in runs.items():
        seconds = sum(entry["seconds"] for entry in entries)
        at = min(entry["made"]["at"] for entry in entries)
        yield f"- `{command}`: {len(entries)} cases, {seconds:.0f} s; {at}; {card}; torch {version}"
