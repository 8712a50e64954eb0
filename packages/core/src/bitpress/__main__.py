"""`python -m bitpress`; the command `bitpress` is safer in a stranger's folder."""

import os
import sys

# Python has put the current folder first, and a model may lie there, with modules and plugins of a
# stranger. What is there under the name of this package itself has been run before this line.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from bitpress.cli import main

if __name__ == "__main__":
    main()
