"""The page's section about few-step generation, where `make demo-few-step` has been run."""

from __future__ import annotations

import html
from string import Template

from pipeline.demo.results import Comparison

SECTION = Template("""<h2>Images generated in one step</h2>
<p>A few-step model learnt from the diffusion transformer above where its trajectories end, so that it can jump there:
the same noise in one, two, four and fifty steps of that model, then in one and fifty steps of its teacher. Distances
are of tokens, between what is generated and what is stored (0 is best; other stored tokens are at $floor).</p>
<img src="$image" alt="the same noise in one to fifty steps of the student and of its teacher">
<table>
<tr><th>model<th>steps<th>distance of tokens<th>images a second, sampling<th>with the decoder
$rows
</table>
""")


def few_step_section(result: Comparison, image: str) -> str:
    """Return the section as HTML.

    Args:
        result: what few-step.json of eval/few_step.py holds.
        image: address of its sheet.
    """
    decoding = result.decoder_images_per_second
    rows = []
    for row in result.rows:
        sampling = row.images_per_second
        both = 1 / (1 / sampling + 1 / decoding)
        cells = (
            row.who,
            row.steps,
            f"{row.distance:.3f}",
            f"{sampling:,.1f}",
            f"{both:,.1f}, {100 * both / decoding:.0f} % of the time in the decoder",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells))
    floor = f"{result.distance_of_other_stored_tokens:.3f}"
    return SECTION.substitute(floor=floor, image=image, rows="\n".join(rows))
