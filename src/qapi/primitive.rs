//! Types that JSON has itself.

use super::schema::Schema;
use super::{Error, Members, Path, Result, Type};
use serde_json::Value;
use std::path::PathBuf;

impl Type for bool {
    fn read(value: Value, at: &Path<'_>) -> Result<Self> {
        value.as_bool().ok_or_else(|| at.expected("boolean"))
    }
    fn write(self) -> Value {
        self.into()
    }
    fn describe(schema: &mut Schema) -> String {
        schema.builtin("bool", "boolean")
    }
}

impl Type for String {
    fn read(value: Value, at: &Path<'_>) -> Result<Self> {
        match value {
            Value::String(s) => Ok(s),
            _ => Err(at.expected("string")),
        }
    }
    fn write(self) -> Value {
        self.into()
    }
    fn describe(schema: &mut Schema) -> String {
        schema.builtin("str", "string")
    }
}

/// The same as a string without NUL.
impl Type for PathBuf {
    fn read(value: Value, at: &Path<'_>) -> Result<Self> {
        let s = String::read(value, at)?;
        match s.contains('\0') {
            true => Err(Error::new(format!("Parameter '{at}' holds a NUL character"))),
            false => Ok(s.into()),
        }
    }
    fn write(self) -> Value {
        self.display().to_string().into()
    }
    fn describe(schema: &mut Schema) -> String {
        schema.builtin("str", "string")
    }
}

macro_rules! integers {
    ($($ty:ty = $name:literal),*) => { $(
        impl Type for $ty {
            fn read(value: Value, at: &Path<'_>) -> Result<Self> {
                let wide = match &value {
                    Value::Number(n) => n.as_i64().map(i128::from).or(n.as_u64().map(i128::from)),
                    _ => None,
                };
                let wide = wide.ok_or_else(|| at.expected("integer"))?;
                <$ty>::try_from(wide).map_err(|_| {
                    Error::new(format!("Parameter '{at}' expects {}", $name))
                })
            }
            fn write(self) -> Value {
                self.into()
            }
            fn describe(schema: &mut Schema) -> String {
                schema.builtin("int", "int")
            }
        }
    )* };
}

integers!(
    i64 = "a number from -2^63 to 2^63-1",
    u64 = "a number from 0 to 2^64-1",
    u32 = "a number from 0 to 4294967295",
    u16 = "a number from 0 to 65535",
    u8 = "a number from 0 to 255"
);

impl Type for f64 {
    fn read(value: Value, at: &Path<'_>) -> Result<Self> {
        value.as_f64().ok_or_else(|| at.expected("number"))
    }
    fn write(self) -> Value {
        self.into()
    }
    fn describe(schema: &mut Schema) -> String {
        schema.builtin("number", "number")
    }
}

/// Anything.
impl Type for Value {
    fn read(value: Value, _: &Path<'_>) -> Result<Self> {
        Ok(value)
    }
    fn write(self) -> Value {
        self
    }
    fn describe(schema: &mut Schema) -> String {
        schema.builtin("any", "value")
    }
}

impl<T: Type> Type for Vec<T> {
    fn read(value: Value, at: &Path<'_>) -> Result<Self> {
        let Value::Array(all) = value else { return Err(at.expected("array")) };
        all.into_iter().enumerate().map(|(i, v)| T::read(v, &at.index(i))).collect()
    }
    fn write(self) -> Value {
        self.into_iter().map(T::write).collect()
    }
    fn describe(schema: &mut Schema) -> String {
        let element = T::describe(schema);
        schema.array(element)
    }
}

/// What may be left out.
impl<T: Type> Type for Option<T> {
    fn read(value: Value, at: &Path<'_>) -> Result<Self> {
        T::read(value, at).map(Some)
    }
    fn write(self) -> Value {
        self.map_or(Value::Null, T::write)
    }
    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }
    const OPTIONAL: bool = true;
    fn absent(_: &Path<'_>) -> Result<Self> {
        Ok(None)
    }
    fn put(self, name: &str, into: &mut Members) {
        if let Some(v) = self {
            v.put(name, into);
        }
    }
}
