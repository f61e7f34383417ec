"""placeholder"""
def allocate() -> None:
    """TODO"""
