"""What every measurement's tests share."""

from threads import one_thread  # noqa: F401
