"""What the rehearsal of a later plan gives to pytest: the first plan's has run some of the kernels' own tests."""


def test_that_tests_are_run() -> None:
    """Passes."""
