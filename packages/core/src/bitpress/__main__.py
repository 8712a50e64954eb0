"""`python -m bitpress`."""

from bitpress.cli import main

if __name__ == "__main__":
    main()
