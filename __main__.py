"""`python -m mono_internvl` is `mono-internvl`; Python imports the library, the module's package, before it."""

from mono_internvl_cli import main


if __name__ == "__main__":
    main()
