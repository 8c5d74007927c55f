"""`python -m mono_internvl` is `mono-internvl`."""

from mono_internvl.cli import main


if __name__ == "__main__":
    main()
