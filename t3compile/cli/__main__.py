"""python -m t3compile.cli"""

from t3compile.cli import main

if __name__ == "__main__":
    main()
