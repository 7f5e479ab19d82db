"""`python -m aegpo` is `aegpo`."""

from aegpo.cli import main

if __name__ == "__main__":
    main()
