"""`armillary bench attention`: attention against its peers; with `--choices`, which implementation computes what."""

from armillary.kernels.attention.choice import CHOICES
from armillary.launch.bench.by_name import Row, print_table


def rows(repetitions: int) -> list[Row]:
    """Our attention beside torch's, on this CPU."""
    from armillary.launch.bench.attention_cpu import cpu_rows

    return cpu_rows(repetitions)


def print_choices() -> list[Row]:
    """Prints and returns the table of implementations: the first line that applies to a call computes it."""
    choices = [{"implementation": each.implementation, "where": each.where, "why": each.why} for each in CHOICES]
    print_table([list(choices[0]), *(list(each.values()) for each in choices)])
    return choices
