//! Guest memory accesses of helpers and slow paths.
