"""What an annotation made, for a terminal: `medsight data annotate`."""

from .annotation_output import AnnotationCounts


def summary(counts: AnnotationCounts) -> str:
    """A table of what was made, for a terminal."""
    lines = [f"{counts.images} images, {counts.conversations} conversations", ""]
    lines += [f"{name:<24}{count:>8}" for name, count in sorted(counts.intents.items())]
    lines += ["", f"{'group':<24}{'masks':>8}{'codes in use':>14}{'perplexity':>12}"]
    for name, usage in counts.code_usage().items():
        used = f"{usage['used']} of {usage['codes']}"
        lines.append(f"{name:<24}{usage['masks']:>8}{used:>14}{usage['perplexity']:>12}")
    if counts.masks_beyond_queries:
        lines.append(f"\n{counts.masks_beyond_queries} masks beyond the number of region queries of their image")
    if counts.skipped:
        lines.append(f"\n{len(counts.skipped)} images left out, each named in README.md")
    return "\n".join(lines)
