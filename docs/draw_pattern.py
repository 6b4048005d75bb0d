"""Draw docs/pattern.svg: one window of each branch on a small grid. Run from the repository root."""

from __future__ import annotations

from pathlib import Path

from t3compile.geometry import Splits, TokenGrid, dilated_part, local_part

GRID = TokenGrid(1, 8, 12)
SPLITS = Splits(1, 2, 3)
QUERY = (2, 5)
CELL = 18
GAP = 70
TOP = 44
LEFT = 12
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948")

PANELS = (
    ("full: every token", None),
    ("local branch: contiguous windows", local_part),
    ("dilated branch: tokens n apart", dilated_part),
)


def window_of(part_of, h: int, w: int) -> int:
    return part_of(h, GRID.h, SPLITS.h) * SPLITS.w + part_of(w, GRID.w, SPLITS.w)


def panel(x: int, title: str, part_of) -> list[str]:
    shapes = [f'<text x="{x}" y="{TOP - 14}">{title}</text>']
    for h in range(GRID.h):
        for w in range(GRID.w):
            window = 0 if part_of is None else window_of(part_of, h, w)
            seen = part_of is None or window == window_of(part_of, *QUERY)
            stroke = ' stroke="black" stroke-width="3"' if (h, w) == QUERY else ' stroke="white"'
            shapes.append(
                f'<rect x="{x + w * CELL}" y="{TOP + h * CELL}" width="{CELL}" height="{CELL}" '
                f'fill="{COLOURS[window]}" fill-opacity="{1.0 if seen else 0.25}"{stroke}/>'
            )
    return shapes


def draw() -> str:
    width = len(PANELS) * (GRID.w * CELL + GAP)
    height = TOP + GRID.h * CELL + 66
    shapes = [
        shape for i, (title, law) in enumerate(PANELS) for shape in panel(LEFT + i * (GRID.w * CELL + GAP), title, law)
    ]
    captions = (
        f"One frame of {GRID.h} x {GRID.w} tokens, splits {SPLITS}: the framed query sees the tokens in full colour.",
        "The output is the mean of the two branches; weights are those of the full model.",
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="14">',
            '<rect width="100%" height="100%" fill="white"/>',
            *shapes,
            *(f'<text x="{LEFT}" y="{height - 34 + 20 * i}">{text}</text>' for i, text in enumerate(captions)),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path("docs/pattern.svg").write_text(draw(), encoding="utf-8")
