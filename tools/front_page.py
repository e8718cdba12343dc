"""The measured parts of README.md, generated from results/gate*.json and results/readme_picture.json.

One accuracy is a mean over the data sets of the gate study; the page that :mod:`reproduction.gate_tables` writes has
each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from tools.readme_picture import RECORD, caption
from zepad_mm.models.config import CONFIG, Policy
from zepad_mm.models.serialization import EMBEDDED_MODEL
from zepad_mm.utils.io import read_json
from zepad_mm.utils.text import markdown_table, percent

ROOT = Path(__file__).parents[1]
GATE = ROOT / "results" / "gate.json"
TRANSFER = ROOT / "results" / "gate_transfer.json"  # attacks on each image of the other sets
COST = ROOT / "results" / "gate_cost.json"
PICTURE_MARKS = ("<!-- picture: written by tools/render_docs.py -->", "<!-- /picture -->")
TABLE_MARKS = ("<!-- results: written by tools/render_docs.py from results/gate.json -->", "<!-- /results -->")
TRANSFER_ATTACKS = {
    "pgd_stopped": "an attack on the public encoder that stops at its first mistake",
    "mi": "momentum PGD on the public encoder",
}
TITLES = {
    "zero_sacrifice": "defended, `zero_sacrifice`",
    "white_box": "defended, `white_box`",
}


def between(text: str, marks: tuple[str, str], block: str) -> str:
    """The text with the block between two marks written again. Raises ValueError unless each mark is there once."""
    start, end = marks
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {start} and {end} once each")
    before, rest = text.split(start)
    return f"{before}{start}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def front_page(old: str) -> str:
    """The README with its picture's caption and its table written again."""
    picture = caption(read_json(RECORD))
    new = between(
        old,
        PICTURE_MARKS,
        f"![Photos before and after an attack, with the answers](docs/images/readme.png)\n\n{picture}",
    )
    cost = read_json(COST)["ratios"]["defended / undefended"] if COST.is_file() else None
    record = with_transfer(read_json(GATE), read_json(TRANSFER))
    study = GateRecord(record, read_json(EMBEDDED_MODEL / CONFIG), cost)
    return between(
        new,
        TABLE_MARKS,
        "\n\n".join([study.columns(), study.table(), study.white_box(), study.price(), study.source()]),
    )


def with_transfer(record: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the gate study with the per-image attacks of a second one of the same gate.

    Raises:
        ValueError: another gate.
    """
    configs = [next(iter(one["meta"]["config"]["gates"].values())) for one in (record, further)]
    if configs[0] != configs[1]:
        raise ValueError("expected two records of one gate, got different configurations")
    sets = {}
    for name, one in record["sets"].items():
        more = further["sets"].get(name, {"rows": []})["rows"]
        sets[name] = {**one, "rows": one["rows"] + [row for row in more if row["threat"] == "T1i"]}
    return {**record, "sets": sets}


@dataclass(frozen=True)
class GateRecord:
    """The record of the gate study, beside the configuration of the shipped model.

    Attributes:
        record: as :mod:`reproduction.gate_study` writes it.
        model: the configuration.
        cost: time of the defended model over that of one encoder; None where it is not measured.
    """

    record: Mapping[str, Any]
    model: Mapping[str, Any]
    cost: float | None = None

    @property
    def gate(self) -> str:
        """Name of the gate in the record."""
        return str(next(iter(self.record["meta"]["config"]["gates"])))

    @property
    def caps(self) -> dict[str, float]:
        """Operating point to the largest weight of the public encoder."""
        return {name: self.model["policy_caps"][name] for name in get_args(Policy)}

    def rows(self, threat: str) -> list[list[dict[str, Any]]]:
        """The rows of a threat model, one list for each data set that has any."""
        found = [[row for row in one["rows"] if row["threat"] == threat] for one in self.record["sets"].values()]
        return [rows for rows in found if rows]

    def share(self, row: Mapping[str, Any], who: str) -> float:
        """The accuracy of "undefended", "robust" or an operating point in a row."""
        if who not in self.caps:
            return float(row[who])
        caps = self.record["caps"]
        nearest = min(range(len(caps)), key=lambda index: abs(caps[index] - self.caps[who]))
        if abs(caps[nearest] - self.caps[who]) > 1e-6:
            raise ValueError(f"results/gate.json has no cap {self.caps[who]}, the one of {who}; measured: {caps}")
        return float(row["gates"][self.gate]["by_cap"][nearest])

    def accuracy(self, who: str, threat: str) -> float:
        """Mean over data sets of the accuracy under the strongest attack of a threat model on each."""
        return mean(min(self.share(row, who) for row in rows) for rows in self.rows(threat))

    def answered(self, who: str) -> tuple[int, int, int] | None:
        """Right answers before and after T2, of how many images; None where it is not measured."""
        cap = {"robust": 0.0, **self.caps}.get(who)
        found = [row for rows in self.rows("T2") for row in rows if row["cap"] == cap]
        if not found:
            return None
        before, after = (sum(row["right"][index] for row in found) for index in (0, -1))
        return before, after, sum(row["n"] for row in found)

    def table(self) -> str:
        """The undefended encoder, the robust one, and both operating points."""
        sizes = sorted({row["epsilon"] for rows in self.rows("T1i") for row in rows})
        head = ["accuracy in %", "clean", "T1, 10/255", f"T1i, {', '.join(map(str, sizes))}/255", "T2, 4/255"]
        titles = {"undefended": "undefended CLIP", "robust": "its robust copy alone", **TITLES}
        lines = []
        for who, title in titles.items():
            cells = [percent(self.accuracy(who, threat)) for threat in ("clean", "T1", "T1i")]
            found = self.answered(who)
            # an attack on the public encoder that knows the class names is white-box to that encoder
            white = (
                cells[-1] if who == "undefended" else "not measured" if found is None else percent(found[1] / found[2])
            )
            passes = len(self.model["branches"]) if who in TITLES else 1
            time = passes if self.cost is None or who not in TITLES else self.cost
            lines.append([title, *cells, white, str(passes) if self.cost is None else f"{time:.1f}x"])
        return markdown_table([*head, "encoders run" if self.cost is None else "time"], lines)

    def white_box(self) -> str:
        """What the white-box attacker achieves, for whatever was measured."""
        found = {who: self.answered(who) for who in TITLES}
        measured = {who: numbers for who, numbers in found.items() if numbers is not None}
        if not measured:
            return "**What a white-box attacker achieves is not measured on this model.**"
        counts = "; ".join(
            f"with `{who}` {before} of {n} images are answered right before the attack and {after} after it"
            for who, (before, after, n) in measured.items()
        )
        everything = all(after == 0 for _, after, _ in measured.values())
        verdict = (
            "An attacker who knows the whole defence and attacks each image succeeds on every image"
            if everything
            else "An attacker who knows the whole defence and attacks each image still takes right answers away"
        )
        return f"**{verdict}** (T2, 4/255): {counts}."

    def price(self) -> str:
        """What the second encoder and the gate buy over the robust encoder alone."""
        points = {
            threat: round(100 * (self.accuracy("zero_sacrifice", threat) - self.accuracy("robust", threat)), 1) + 0.0
            for threat in ("clean", "T1", "T1i")
        }
        moved = ", ".join(
            f"{value:+.1f} {'on clean images' if key == 'clean' else f'under {key}'}" for key, value in points.items()
        )
        return (
            f"Beside the robust copy alone, `zero_sacrifice` moves the accuracy by {moved} (points), runs "
            f"{len(self.model['branches'])} encoders in place of one, and says of each image whether it looks "
            f"attacked. {self.weakest_transfer()}"
        )

    def weakest_transfer(self) -> str:
        """The attack of T1i under which the gate loses most against the robust encoder, in the mean over the sets."""
        groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in (row for rows in self.rows("T1i") for row in rows):
            shares = self.share(row, "zero_sacrifice"), self.share(row, "robust")
            groups.setdefault((row["attack"], row["epsilon"]), []).append(shares)
        means = {key: [mean(column) for column in zip(*shares, strict=True)] for key, shares in groups.items()}
        (attack, epsilon), (gated, robust) = min(means.items(), key=lambda item: item[1][0] - item[1][1])
        return (
            f"It loses most to {TRANSFER_ATTACKS.get(attack, attack)} (T1i, {epsilon}/255), since the gate misses many "
            f"of its small changes: {percent(gated)} %, and {percent(robust)} % of the robust copy alone."
        )

    def columns(self) -> str:
        """What the columns mean."""
        return (
            "T1: one perturbation for all images, made on the public encoder; the strongest of several on each set. "
            "T1i: each image is attacked on the public encoder. T2: each image is attacked through the whole defence, "
            "by an attacker who knows everything. Budgets: the largest change of a pixel."
        )

    def source(self) -> str:
        """Where the numbers come from."""
        sets = self.record["sets"]
        counts = ", ".join(sorted({str(one["n"]) for one in sets.values()}))
        names = {
            threat: ", ".join(name for name, one in sets.items() if any(row["threat"] == threat for row in one["rows"]))
            for threat in ("T1i", "T2")
        }
        sizes = ", ".join(sorted({str(row["n"]) for rows in self.rows("T2") for row in rows})) or "no"
        same = self.record["meta"]["config"]["gates"][self.gate]["threshold"] == self.model["gate"]["threshold"]
        everywhere = names["T1i"].count(",") + 1 == len(sets)
        transfer = "" if everywhere else f"T1i on {names['T1i'] or 'no set'}; "
        return (
            f"Means over {len(sets)} data sets with {counts} test images each, small embedded CLIP, one seed; "
            f"{transfer}T2 on {sizes} images of {names['T2'] or 'no set'}. Each set and attack: "
            "[results/gate.md](results/gate.md)."
            + ("" if same else " The record was measured with an earlier gate than the one that ships.")
        )
