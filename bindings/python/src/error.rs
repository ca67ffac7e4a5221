//! The library's errors as Python exceptions, with the library's text.

use ferroflash::Error;
use pyo3::{
    PyErr,
    exceptions::{PyMemoryError, PyRuntimeError, PyTypeError, PyValueError},
};

/// Returns the exception for an error: `ValueError` for wrong input, `TypeError` for a wrong element type,
/// `MemoryError` if there is no memory, and `RuntimeError` for what the machine does.
pub fn exception(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::DtypeMismatch { .. } => PyTypeError::new_err(text),
        Error::OutOfMemory { .. } => PyMemoryError::new_err(text),
        error if error.is_bad_input() => PyValueError::new_err(text),
        _ => PyRuntimeError::new_err(text),
    }
}

/// True if a copy of an input would not raise this error.
pub fn is_layout(error: &Error) -> bool {
    matches!(
        error,
        Error::StrideNotMultiple { .. }
            | Error::StrideTooLarge { .. }
            | Error::SpanTooLarge { .. }
            | Error::Misaligned { .. }
    )
}
