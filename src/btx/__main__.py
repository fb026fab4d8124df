"""`python -m btx` is `btx`."""

from btx.cli.main import main

if __name__ == "__main__":
    main()
