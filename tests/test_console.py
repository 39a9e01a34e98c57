"""What a terminal prints is whole."""

from io import StringIO

from rich.table import Table

from finecap_ray.console import plain_console, print_whole


def test_a_table_is_as_wide_as_it_has_to_be():
    table = Table(title="Retrieval")
    for number in range(6):
        table.add_column(f"column {number}")
    table.add_row(*["63.5 (59.4 to 67.8)"] * 6)
    console = plain_console()
    console.file, console.width = StringIO(), 40
    print_whole(console, table)
    assert console.file.getvalue().count("63.5 (59.4 to 67.8)") == 6
