"""Tables and plots of `benchmarks.step`: docs/results/step.md and step.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.step import rates
from benchmarks.step.dispatch_ledger import Counts

MIB, GB = 2**20, 1e9
LABELS = {
    "student": "student alone",
    "lgd": "LGD",
    "icd": "ICD",
    "fgfi": "FGFI",
    "teacher": "the teacher's own training",
}
FORMS = {
    "plain": "plain float32",
    "float32": "ours float32",
    "plain-bfloat16": "plain bfloat16",
    "bfloat16": "ours bfloat16",
}
PEERS = {"float32": "plain", "bfloat16": "plain-bfloat16"}  # the plain form of the same dtype and memory format
OPTIONS = {"bfloat16": "ours bfloat16", "recompute": "and --runtime.recompute", "compile": "and --runtime.compile"}
SPEED_TARGETS = {("lgd", "float32"): 1.4, ("icd", "float32"): 1.25, ("icd", "bfloat16"): 2.2}  # over the peer
STEP_TARGETS = {("lgd", "bfloat16"): 1.35, ("icd", "bfloat16"): 1.5}  # times the student's step
LGD_SHARES = (1 / 2, 1 / 2)  # targets relative to the peer: bytes, peak memory
ICD_TARGETS = {"float32": 5, "bfloat16": 8}  # speed-up over the peer
ICD_SHARES = (1 / 8, 1 / 10)  # as LGD_SHARES


def seconds(entry: dict[str, Any]) -> float:
    """The fastest step."""
    return min(entry["seconds"])


def peak(entry: dict[str, Any]) -> int:
    """Peak memory in bytes."""
    return entry["transient_bytes"] + entry["resident_bytes"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(row: dict[str, Any]) -> str:
    """Description of a problem."""
    name = {"retinanet": "RetinaNet-R50", "faster-rcnn": "Faster R-CNN-R50"}[row["detector"]]
    return f"{name}, B = {row['images']}, {row['boxes']} boxes an image, {row['height']} x {row['width']}"


def row_table(row: dict[str, Any]) -> str:
    """Seconds and peak memory of a problem's steps; in brackets the speed-up over the plain form of the same dtype."""
    lines = []
    for method, label in LABELS.items():
        found = {form: row["entries"].get(f"{method}/{form}") for form in FORMS}
        if not any(found.values()):
            continue
        times, sizes = [], []
        for form, entry in found.items():
            peer = found.get(PEERS.get(form, ""))
            faster = f" ({seconds(peer) / seconds(entry):.2f} x)" if peer and entry else ""
            times.append(f"{seconds(entry):.2f} s{faster}" if entry else "")
            sizes.append(peak_cell(entry) if entry else "")
        lines.append([label, *times, *sizes])
    head = ["step", *FORMS.values(), *(f"peak, {label}" for label in FORMS.values())]
    return f"### {name_of(row)}\n\n{table(head, lines)}\n"


def peak_cell(entry: dict[str, Any]) -> str:
    """Peak memory, if measured."""
    return f"{peak(entry) / MIB:,.0f} MiB" if "transient_bytes" in entry else ""


def options_table(row: dict[str, Any]) -> str:
    """Effect of the trainer's options on a bfloat16 step: seconds and peak memory."""
    lines = []
    for method, label in LABELS.items():
        found = [row["entries"].get(f"{method}/{form}") for form in OPTIONS]
        if any(found[1:]):
            times = [f"{seconds(entry):.2f} s" if entry else "" for entry in found]
            lines.append([label, *times, *(peak_cell(entry) if entry else "" for entry in found)])
    head = ["step", *OPTIONS.values(), *(f"peak, {label}" for label in OPTIONS.values())]
    return f"### Options: {name_of(row)}\n\n{table(head, lines)}\n" if lines else ""


def counts(values: dict[str, Any]) -> Counts:
    """`Counts` from a stored ledger."""
    return Counts(**values)


def step_ratios(row: dict[str, Any], machine_rates: dict[str, dict[str, float]] | None) -> str:
    """Every step beside its student's, and the share of it that its arithmetic takes at the machine's rates."""
    lines, entries = [], row["entries"]
    for method in ("student", "lgd", "icd"):
        for form, label in FORMS.items():
            entry, student = entries.get(f"{method}/{form}"), entries.get(f"student/{form}")
            if entry is None or student is None:
                continue
            ratio = seconds(entry) / seconds(student)
            wanted = STEP_TARGETS.get((method, form))
            aim = f"<= {wanted} x: {_met(ratio <= wanted)}" if wanted else ""
            lines.append([f"{LABELS[method]}, {label}", f"{ratio:.2f} x", aim, *_shares(entry, form, machine_rates)])
    head = ["step", "the student's step", "aim", "convolutions, GFLOP", "other, GFLOP", "share of the limit"]
    return f"### Beside the student, and the machine's limit: {name_of(row)}\n\n{table(head, lines)}\n" if lines else ""


def _shares(entry: dict[str, Any], form: str, machine_rates: dict[str, dict[str, float]] | None) -> list[str]:
    """Operations of a step, and the least seconds for them as a share of its seconds; empty if not measured."""
    if machine_rates is None or "ledger" not in entry:
        return ["", "", ""]
    found = counts(entry["ledger"])
    dtype = "bfloat16" if form.endswith("bfloat16") else "float32"
    least = rates.least_seconds(found.flops, found.convolutions, machine_rates[dtype])
    sizes = (found.convolutions, found.flops - found.convolutions)
    return [*(f"{size / GB:,.0f}" for size in sizes), f"{least / seconds(entry):.0%}"]


def own_part(row: dict[str, Any], method: str, form: str) -> Counts | None:
    """The ledger of a method without student and teacher; None if some part was not counted."""
    whole, alone = row["entries"].get(f"{method}/{form}"), row["entries"].get(f"student/{form}")
    if whole is None or alone is None or "ledger" not in whole or "ledger" not in alone:
        return None
    own = counts(whole["ledger"]).minus(counts(alone["ledger"]))
    if "teacher_ledger" in whole:
        asked = counts(whole["teacher_ledger"])
        peak_bytes = own.peak  # the teacher's temporaries are freed before the student's peak
        own = own.minus(asked)
        own.peak = peak_bytes
    return own


def ledger_lines(label: str, found: Counts) -> list[str]:
    """A line of the ledger."""
    numbers = [found.ops - found.views, found.ops, found.syncs]
    sizes = [found.bytes_read / GB, found.bytes_written / GB, found.flops / GB, found.largest / MIB, found.peak / MIB]
    return [label, *(f"{n:,d}" for n in numbers), *(f"{s:,.2f}" for s in sizes[:2]), *(f"{s:,.0f}" for s in sizes[2:])]


def ledger_table(row: dict[str, Any]) -> str:
    """Counts of student, method and their difference."""
    lines = []
    for method, label in LABELS.items():
        for form, form_label in (FORMS | OPTIONS).items():
            entry = row["entries"].get(f"{method}/{form}")
            if entry is None or "ledger" not in entry:
                continue
            lines.append(ledger_lines(f"{label}, {form_label}", counts(entry["ledger"])))
            own = own_part(row, method, form) if method not in ("student", "teacher") else None
            if own is not None:
                lines.append(ledger_lines(f"*{label}'s own part, {form_label}*", own))
    head = ["", "kernels", "with views", "waits", "GB read", "GB written", "GFLOP", "largest, MiB", "peak, MiB"]
    return f"### Ledger: {name_of(row)}\n\n{table(head, lines)}\n" if lines else ""


def targets(row: dict[str, Any]) -> str:
    """The targets with measured values, against the plain form of the same dtype."""
    lines, entries = [], row["entries"]
    for (method, form), wanted in SPEED_TARGETS.items():
        plain, own = entries.get(f"{method}/{PEERS[form]}"), entries.get(f"{method}/{form}")
        if plain and own:
            ratio = seconds(plain) / seconds(own)
            lines.append(
                [f"{LABELS[method]}, {FORMS[form]}", f"{wanted} x faster", f"{ratio:.2f} x", _met(ratio >= wanted)]
            )
    for form, peer in PEERS.items():
        plain, own = own_part(row, "lgd", peer), own_part(row, "lgd", form)
        if plain is not None and own is not None:
            lines += share_lines(f"LGD's own part, {FORMS[form]}", own, plain, *LGD_SHARES)
    return f"### Targets: {name_of(row)}\n\n{table(['', 'target', 'measured', 'met'], lines)}\n" if lines else ""


def share_lines(label: str, own: Counts, plain: Counts, share: float, memory: float) -> list[list[str]]:
    """Bytes and peak memory of a method's part, with targets."""
    lines = []
    for what, wanted, mine, theirs in (
        ("bytes", share, own.bytes, plain.bytes),
        ("extra peak memory", memory, own.peak, plain.peak),
    ):
        found = f"{mine / GB:.2f} GB (plain {theirs / GB:.2f} GB)"
        good = theirs > 0 and mine <= wanted * theirs
        lines.append([f"{label}: {what}", f"1/{1 / wanted:.0f} of plain's", found, _met(good)])
    return lines


def own_table(own: dict[str, Any]) -> str:
    """ICD without a detector: its ledger and targets."""
    entries, problem, head = own["entries"], own["problem"], ["", "seconds", "kernels", "GB", "GFLOP", "peak, MiB"]
    rows, lines = [], []
    for form, entry in entries.items():
        found = counts(entry["ledger"])
        numbers = [f"{found.ops - found.views}", f"{found.bytes / GB:.2f}", f"{found.flops / GB:.0f}"]
        rows.append([FORMS[form], f"{seconds(entry):.3f}", *numbers, f"{found.peak / MIB:,.0f}"])
        if form in PEERS and PEERS[form] in entries:
            plain, label = entries[PEERS[form]], f"ICD's own part, {FORMS[form]}"
            ratio = seconds(plain) / seconds(entry)
            wanted = ICD_TARGETS[form]
            lines.append([f"{label}: time", f"{wanted} x faster", f"{ratio:.1f} x", _met(ratio >= wanted)])
            lines += share_lines(label, found, counts(plain["ledger"]), *ICD_SHARES)
    size = f"B = {problem['images']}, {problem['boxes']} boxes, {problem['height']} x {problem['width']}"
    text = f"### ICD's own part alone, forward and backward, {size}\n\n{table(head, rows)}\n"
    return text + (f"\n{table(['', 'target', 'measured', 'met'], lines)}\n" if lines else "")


def _met(good: bool) -> str:
    return "yes" if good else "no"


def fgfi_ledger(row: dict[str, Any], ratio: float = 1.0) -> str:
    """Additional cost of LGD compared with FGFI including its teacher's training (methods.md 4).

    Args:
        ratio: teacher training steps per student step.
    """
    names = [f"{method}/float32" for method in ("student", "lgd", "fgfi", "teacher")]
    if not all(name in row["entries"] for name in names):
        return ""
    student, lgd, fgfi, teacher = (seconds(row["entries"][name]) for name in names)
    alone, with_teacher = fgfi - student, fgfi - student + ratio * teacher
    saved = 1 - (lgd - student) / with_teacher
    lines = [
        ["LGD", f"{lgd - student:.2f} s", "none", f"{lgd - student:.2f} s"],
        ["FGFI", f"{alone:.2f} s", f"{teacher:.2f} s", f"{with_teacher:.2f} s"],
    ]
    head = ["extra over the student, ours float32", "in the step", "teacher's training step", "together"]
    return (
        f"### Cost beside FGFI: {name_of(row)}\n\n{table(head, lines)}\n\nThe R101 teacher trains as many steps as the "
        f"student. LGD's extra cost is {saved:.0%} lower (target: at least 51 %): {_met(saved >= 0.51)}.\n"
    )


def report(saved: dict[str, Any]) -> str:
    """The text of step.md."""
    cpu, torch_version = saved["machine"]["cpu"], saved["machine"]["torch"]
    parts = [
        "# A training step\n",
        f"`{saved['command']}` at {saved['commit']}, {saved['threads']} threads of {cpu}, torch {torch_version}; "
        f"{saved['seconds'] / 60:.0f} minutes. Seconds are minima of a few steps taken turn and turn about in one "
        "process. Plain: the published algorithm in eager torch on torchvision's detectors, teacher R101 "
        "(benchmarks/step/candidates.py); bfloat16 is under autocast with channels-last tensors, plain as ours, and "
        "each ratio is taken against plain in the same dtype; empty cells were not measured. Peak memory: what the "
        "allocator hands out at the worst moment, with weights, optimiser states and teacher.\n",
        *(row_table(row) for row in saved["rows"]),
        "Ledger: counted by a dispatch mode, nominal and machine-independent: every operand read once and every result "
        "written once; kernels are dispatched operators but views; waits are points where a GPU's host would wait. A "
        "method's own part is its step less the student's and the teacher's forward.\n",
    ]
    machine_rates = saved.get("rates")
    if machine_rates is not None:
        parts.append(rates_text(machine_rates))
    parts += [text for row in saved["rows"] if (text := step_ratios(row, machine_rates))]
    if saved["icd_alone"] is not None:
        parts.append(own_table(saved["icd_alone"]))
    for make in (targets, options_table, fgfi_ledger, ledger_table):
        parts += [text for row in saved["rows"] if (text := make(row))]
    if saved["skipped"]:
        parts.append(
            "Not measured, time or memory was over: " + "; ".join(name_of(row) for row in saved["skipped"]) + ".\n"
        )
    return "\n".join(parts)


def rates_text(found: dict[str, dict[str, float]]) -> str:
    """The machine's rates as a sentence."""
    parts = [
        f"{name}: convolutions {kinds['convolutions'] / GB:,.0f}, products {kinds['products'] / GB:,.0f} GFLOP/s"
        for name, kinds in found.items()
    ]
    return (
        f"The machine's rates, measured before the steps: {'; '.join(parts)} (a 3x3 convolution of 256 channels, "
        "channels-last; two 2048 x 2048 matrices). Share of the limit: the seconds that a step's convolutions and "
        "products take at these rates, of its seconds.\n"
    )


def quote(saved: dict[str, Any]) -> str:
    """The lines for the README: the first problem of each detector, each method's step and its plain form."""
    lines, seen = [], set()
    forms = [form for form in FORMS if any(f"student/{form}" in row["entries"] for row in saved["rows"])]
    for row in saved["rows"]:
        if row["detector"] in seen:
            continue
        seen.add(row["detector"])
        for method in ("student", "lgd", "icd"):
            found = {form: row["entries"].get(f"{method}/{form}") for form in forms}
            if not all(found.values()):
                continue
            cells = []
            for form, entry in found.items():
                peer = found.get(PEERS.get(form, ""))
                cells.append(
                    f"{seconds(entry):.2f} s" + (f" (**{seconds(peer) / seconds(entry):.2f} x**)" if peer else "")
                )
            memory = [peak_cell(found[form]) for form in (forms[0], forms[-1])]
            lines.append([f"{name_of(row).split(',')[0]}, {LABELS[method]}", *cells, *memory])
    return table(["step", *(FORMS[form] for form in forms), "peak, plain", "peak, ours bfloat16"], lines)


def plot(saved: dict[str, Any], path: Path) -> None:
    """Plot seconds of every step, one panel per problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"plain": "#c3cad2", "float32": "#3b7dd8", "plain-bfloat16": "#828d99", "bfloat16": "#2a9d5c"}
    rows = saved["rows"]
    measured = {name.partition("/")[2] for row in rows for name in row["entries"]}
    forms = [form for form in FORMS if form in measured]
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 3.4 * lines), layout="constrained", squeeze=False
    )
    for axis in grid.flat[len(rows) :]:
        axis.remove()
    for axis, row in zip(grid.flat, rows):
        methods = [method for method in ("student", "lgd", "icd") if f"{method}/plain" in row["entries"]]
        for offset, form in enumerate(forms):
            values = [row["entries"].get(f"{method}/{form}") for method in methods]
            places = [place + (offset - (len(forms) - 1) / 2) * 0.21 for place in range(len(methods))]
            bars = [seconds(entry) if entry else 0.0 for entry in values]
            axis.bar(places, bars, 0.19, color=colours[form], label=FORMS[form])
        axis.set_xticks(range(len(methods)), [LABELS[method] for method in methods])
        axis.set_title(f"{row['detector']}, B = {row['images']}, {row['boxes']} boxes", fontsize=9)
        axis.set_ylabel("seconds a step")
        axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
