"""The paper's tables: its figures, the runs behind them, what runs them, and the report."""
