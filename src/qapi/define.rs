//! The macros that define types, commands and events. Member and value names become those of the
//! wire by turning `_` into `-`; `as "name"` gives one that differs.

/// Defines an object type.
///
/// ```text
/// object! {
///     /// What it is.
///     pub struct VersionTriple {
///         /// What the member means.
///         major: i64,
///         cpu_index as "cpu-index": Option<i64>,
///     }
/// }
/// ```
#[macro_export]
macro_rules! object {
    ($(
        $(#[doc = $doc:literal])*
        $vis:vis struct $Name:ident {
            $( $(#[doc = $fdoc:literal])* $field:ident $(as $wire:literal)? : $ty:ty ),* $(,)?
        }
    )*) => { $(
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $Name { $( $(#[doc = $fdoc])* pub $field: $ty ),* }

        impl $crate::qapi::Object for $Name {
            #[allow(unused_variables)]
            fn take(
                members: &mut $crate::qapi::Members,
                at: &$crate::qapi::Path<'_>,
            ) -> $crate::qapi::Result<Self> {
                Ok($Name { $(
                    $field: $crate::qapi::field(members, &$crate::wire_name!($field $(as $wire)?), at)?,
                )* })
            }
            #[allow(unused_variables)]
            fn give(self, into: &mut $crate::qapi::Members) {
                $( $crate::qapi::Type::put(self.$field, &$crate::wire_name!($field $(as $wire)?), into); )*
            }
            #[allow(unused_variables)]
            fn members(schema: &mut $crate::qapi::schema::Schema) -> Vec<$crate::qapi::schema::Member> {
                vec![ $( $crate::qapi::schema::Member {
                    name: $crate::wire_name!($field $(as $wire)?),
                    doc: &[$($fdoc),*],
                    ty: <$ty as $crate::qapi::Type>::describe(schema),
                    optional: <$ty as $crate::qapi::Type>::OPTIONAL,
                } ),* ]
            }
        }

        $crate::object_is_type!($Name, $($doc),*);
    )* };
}

/// What is an object is a type: it travels as its members.
#[macro_export]
macro_rules! object_is_type {
    ($Name:ident, $($doc:literal),*) => {
        impl $crate::qapi::Type for $Name {
            fn read(value: serde_json::Value, at: &$crate::qapi::Path<'_>) -> $crate::qapi::Result<Self> {
                $crate::qapi::read_object(value, at)
            }
            fn write(self) -> serde_json::Value {
                let mut members = $crate::qapi::Members::new();
                $crate::qapi::Object::give(self, &mut members);
                serde_json::Value::Object(members)
            }
            fn describe(schema: &mut $crate::qapi::schema::Schema) -> String {
                schema.object::<Self>(stringify!($Name), &[$($doc),*])
            }
        }
    };
}

/// The wire's name of a member.
#[macro_export]
macro_rules! wire_name {
    ($field:ident as $wire:literal) => {
        $wire.to_string()
    };
    ($field:ident) => {
        stringify!($field).trim_start_matches("r#").replace('_', "-")
    };
}

/// Defines a type of which a value is one of some words.
#[macro_export]
macro_rules! choice {
    ($(
        $(#[doc = $doc:literal])*
        $vis:vis enum $Name:ident { $( $(#[doc = $vdoc:literal])* $Value:ident = $wire:literal ),* $(,)? }
    )*) => { $(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $Name { $( $(#[doc = $vdoc])* $Value ),* }

        #[allow(dead_code)]
        impl $Name {
            /// All values with their words.
            pub const ALL: &'static [(&'static str, $Name)] = &[$( ($wire, $Name::$Value) ),*];

            /// Its word.
            pub fn word(self) -> &'static str {
                match self { $( $Name::$Value => $wire ),* }
            }
        }

        impl $crate::qapi::Type for $Name {
            fn read(value: serde_json::Value, at: &$crate::qapi::Path<'_>) -> $crate::qapi::Result<Self> {
                let serde_json::Value::String(word) = value else { return Err(at.expected("string")) };
                $crate::qapi::schema::find_word(Self::ALL, &word, at)
            }
            fn write(self) -> serde_json::Value {
                self.word().into()
            }
            fn describe(schema: &mut $crate::qapi::schema::Schema) -> String {
                let values = [$( ($wire, &[$($vdoc),*] as &[&str]) ),*];
                schema.choice(stringify!($Name), &[$($doc),*], &values)
            }
        }
    )* };
}

/// Defines an object type of which one member, the tag, tells what further members there are.
///
/// ```text
/// variants! {
///     /// Doc.
///     pub enum ChardevBackend by "type" { File(ChardevFile) = "file", Null(Nothing) = "null" }
/// }
/// ```
#[macro_export]
macro_rules! variants {
    ($(
        $(#[doc = $doc:literal])*
        $vis:vis enum $Name:ident by $tag:literal {
            $( $(#[doc = $vdoc:literal])* $Case:ident ( $ty:ty ) = $wire:literal ),* $(,)?
        }
    )*) => { $(
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        $vis enum $Name { $( $(#[doc = $vdoc])* $Case($ty) ),* }

        impl $crate::qapi::Object for $Name {
            fn take(
                members: &mut $crate::qapi::Members,
                at: &$crate::qapi::Path<'_>,
            ) -> $crate::qapi::Result<Self> {
                let tag: String = $crate::qapi::field(members, $tag, at)?;
                match tag.as_str() {
                    $( $wire => Ok($Name::$Case(<$ty as $crate::qapi::Object>::take(members, at)?)), )*
                    _ => Err($crate::qapi::schema::no_word(&tag, &[$($wire),*], &at.member($tag))),
                }
            }
            fn give(self, into: &mut $crate::qapi::Members) {
                match self { $( $Name::$Case(v) => {
                    into.insert($tag.to_string(), $wire.into());
                    $crate::qapi::Object::give(v, into);
                } )* }
            }
            fn members(schema: &mut $crate::qapi::schema::Schema) -> Vec<$crate::qapi::schema::Member> {
                let values = [$( ($wire, &[$($vdoc),*] as &[&str]) ),*];
                let ty = schema.choice(
                    concat!(stringify!($Name), "Kind"), &["Which of the variants."], &values);
                vec![$crate::qapi::schema::Member {
                    name: $tag.to_string(), doc: &[" Which of the variants."], ty, optional: false,
                }]
            }
            fn variants(
                schema: &mut $crate::qapi::schema::Schema,
            ) -> Option<(&'static str, Vec<(&'static str, String)>)> {
                Some(($tag, vec![$( ($wire, <$ty as $crate::qapi::Type>::describe(schema)) ),*]))
            }
        }

        $crate::object_is_type!($Name, $($doc),*);
    )* };
}

/// Defines commands. The body sees the context under the name given and each argument under its own.
///
/// ```text
/// commands! {
///     /// Writes guest memory to a file.
///     fn "memsave"(cx, {
///         /// Guest virtual address.
///         val: u64,
///     }) -> Nothing { memory::save(cx.vm, val) }
/// }
/// ```
#[macro_export]
macro_rules! commands {
    ($(
        $(#[doc = $doc:literal])*
        fn $name:literal $([$($feature:literal),*])? ( $cx:ident $(, $args:tt)? ) -> $ret:ty $body:block
    )*) => { $(
        const _: () = {
            $crate::command_arguments!($($args)?);
            fn command_entry(
                $cx: &mut $crate::qapi::Context<'_>,
                members: $crate::qapi::Members,
            ) -> $crate::qapi::Result<serde_json::Value> {
                let arguments: Arguments = $crate::qapi::read_object(
                    serde_json::Value::Object(members), &$crate::qapi::Path::ROOT)?;
                $crate::command_locals!(arguments $(, $args)?);
                let result: $crate::qapi::Result<$ret> = $body;
                result.map($crate::qapi::Type::write)
            }
            tandem_devices::inventory::submit! {
                $crate::qapi::Command {
                    name: $name,
                    doc: &[$($doc),*],
                    features: &[$($($feature),*)?],
                    arguments: |schema| schema.arguments::<Arguments>($name),
                    returns: <$ret as $crate::qapi::Type>::describe,
                    run: command_entry,
                }
            }
        };
    )* };
}

/// The type of a command's arguments: members in braces, or a type by name.
#[macro_export]
macro_rules! command_arguments {
    () => {
        type Arguments = $crate::qapi::define::Nothing;
    };
    ({ $($members:tt)* }) => {
        $crate::object! {
            /// Arguments.
            struct Arguments { $($members)* }
        }
    };
    ([ $var:ident : $ty:ty ]) => {
        type Arguments = $ty;
    };
}

/// Binds a command's arguments to their names.
#[macro_export]
macro_rules! command_locals {
    ($value:ident) => {
        let $crate::qapi::define::Nothing {} = $value;
    };
    ($value:ident, {
        $( $(#[doc = $fdoc:literal])* $field:ident $(as $wire:literal)? : $ty:ty ),* $(,)?
    }) => {
        let Arguments { $($field),* } = $value;
    };
    ($value:ident, [ $var:ident : $ty:ty ]) => {
        let $var: $ty = $value;
    };
}

/// Defines events: each is an object type of its data.
#[macro_export]
macro_rules! events {
    ($(
        $(#[doc = $doc:literal])*
        $Name:ident = $wire:literal { $($members:tt)* }
    )*) => { $(
        $crate::object! {
            $(#[doc = $doc])*
            pub struct $Name { $($members)* }
        }
        impl $crate::qapi::Event for $Name {
            const EVENT: &'static str = $wire;
        }
        tandem_devices::inventory::submit! {
            $crate::qapi::EventType {
                name: $wire,
                doc: &[$($doc),*],
                data: |schema| schema.arguments::<$Name>($wire),
            }
        }
    )* };
}

crate::object! {
    /// No members.
    pub struct Nothing {}
}
