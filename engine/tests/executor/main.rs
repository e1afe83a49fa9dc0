//! The executor with toy stages on threads: no candle, no child process.

mod random;
mod runs;
mod toys;
