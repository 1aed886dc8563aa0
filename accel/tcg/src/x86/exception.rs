//! Exceptions as values.

/// Exception vectors (SDM vol. 3 §6.3.1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// A guest exception: what [`Result`]s of system code carry as their error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exception {
    /// Vector.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// Address for CR2 (page faults), or the one that is not canonical (#GP).
    pub addr: Option<u64>,
    /// DR6 bits to set (debug exceptions).
    pub dr6: u64,
}

impl Exception {
    /// An exception without error code.
    pub const fn plain(vector: u8) -> Exception {
        Exception { vector, error: None, addr: None, dr6: 0 }
    }
    /// An exception with error code.
    pub const fn with_error(vector: u8, error: u32) -> Exception {
        Exception { vector, error: Some(error), addr: None, dr6: 0 }
    }
    /// #UD.
    pub const UD: Exception = Exception::plain(vector::UD);
    /// #NM.
    pub const NM: Exception = Exception::plain(vector::NM);
    /// #GP with this error code (0 or a selector).
    pub const fn gp(error: u32) -> Exception {
        Exception::with_error(vector::GP, error)
    }
    /// Exception `v` as generated code raises it by itself: with error code 0 if it has one.
    pub const fn found_inline(v: u8) -> Exception {
        match v {
            vector::DF | vector::TS..=vector::PF | vector::AC => Exception::with_error(v, 0),
            _ => Exception::plain(v),
        }
    }
    /// #PF at `addr` with this error code (SDM vol. 3 §4.7).
    pub const fn page_fault(addr: u64, error: u32) -> Exception {
        Exception { vector: vector::PF, error: Some(error), addr: Some(addr), dr6: 0 }
    }
}
