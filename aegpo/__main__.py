"""`python -m aegpo` is `aegpo`."""

from aegpo.commands.cli import main

if __name__ == "__main__":
    main()
