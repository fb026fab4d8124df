"""`python -m btx` is `btx`."""

from btx.cli import main

if __name__ == "__main__":
    main()
