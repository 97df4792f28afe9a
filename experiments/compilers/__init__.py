"""The real compilers of machines that are not there."""
