//! Pipeline files from outside: what a good one becomes, and what a bad one is told.

mod cases;
mod files;
mod numbers;
mod random;
mod toys;
