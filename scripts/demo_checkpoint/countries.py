"""Public facts about 190 countries, written for the demo checkpoint.

Members of the United Nations, without Bolivia, Equatorial Guinea and Israel: a country with two capitals, one whose
capital is moving and one whose capital is disputed have no single answer to learn.
"""

from typing import NamedTuple


class Country(NamedTuple):
    """One row of the table; `name` carries its article where English wants one ("the Netherlands")."""

    name: str
    capital: str
    continent: str
    language: str  # the most widely used official or everyday language
    currency: str
    code: str  # ISO 3166-1 alpha-2

    @property
    def flag(self) -> str:
        """The flag emoji: two regional indicator symbols, four UTF-8 bytes each."""
        return "".join(chr(ord("🇦") + ord(letter) - ord("A")) for letter in self.code)


# name | capital | continent | language | currency | code
_TABLE = """
Afghanistan|Kabul|Asia|Pashto|afghani|AF
Albania|Tirana|Europe|Albanian|lek|AL
Algeria|Algiers|Africa|Arabic|Algerian dinar|DZ
Andorra|Andorra la Vella|Europe|Catalan|euro|AD
Angola|Luanda|Africa|Portuguese|kwanza|AO
Antigua and Barbuda|Saint John's|North America|English|East Caribbean dollar|AG
Argentina|Buenos Aires|South America|Spanish|Argentine peso|AR
Armenia|Yerevan|Asia|Armenian|dram|AM
Australia|Canberra|Oceania|English|Australian dollar|AU
Austria|Vienna|Europe|German|euro|AT
Azerbaijan|Baku|Asia|Azerbaijani|manat|AZ
the Bahamas|Nassau|North America|English|Bahamian dollar|BS
Bahrain|Manama|Asia|Arabic|Bahraini dinar|BH
Bangladesh|Dhaka|Asia|Bengali|taka|BD
Barbados|Bridgetown|North America|English|Barbadian dollar|BB
Belarus|Minsk|Europe|Russian|Belarusian ruble|BY
Belgium|Brussels|Europe|Dutch|euro|BE
Belize|Belmopan|North America|English|Belize dollar|BZ
Benin|Porto-Novo|Africa|French|West African CFA franc|BJ
Bhutan|Thimphu|Asia|Dzongkha|ngultrum|BT
Bosnia and Herzegovina|Sarajevo|Europe|Bosnian|convertible mark|BA
Botswana|Gaborone|Africa|Tswana|pula|BW
Brazil|Brasília|South America|Portuguese|real|BR
Brunei|Bandar Seri Begawan|Asia|Malay|Brunei dollar|BN
Bulgaria|Sofia|Europe|Bulgarian|euro|BG
Burkina Faso|Ouagadougou|Africa|Mossi|West African CFA franc|BF
Burundi|Gitega|Africa|Kirundi|Burundian franc|BI
Cambodia|Phnom Penh|Asia|Khmer|riel|KH
Cameroon|Yaoundé|Africa|French|Central African CFA franc|CM
Canada|Ottawa|North America|English|Canadian dollar|CA
Cape Verde|Praia|Africa|Portuguese|Cape Verdean escudo|CV
the Central African Republic|Bangui|Africa|Sango|Central African CFA franc|CF
Chad|N'Djamena|Africa|Arabic|Central African CFA franc|TD
Chile|Santiago|South America|Spanish|Chilean peso|CL
China|Beijing|Asia|Chinese|yuan|CN
Colombia|Bogotá|South America|Spanish|Colombian peso|CO
the Comoros|Moroni|Africa|Comorian|Comorian franc|KM
the Democratic Republic of the Congo|Kinshasa|Africa|French|Congolese franc|CD
the Republic of the Congo|Brazzaville|Africa|French|Central African CFA franc|CG
Costa Rica|San José|North America|Spanish|colón|CR
Croatia|Zagreb|Europe|Croatian|euro|HR
Cuba|Havana|North America|Spanish|Cuban peso|CU
Cyprus|Nicosia|Europe|Greek|euro|CY
the Czech Republic|Prague|Europe|Czech|koruna|CZ
Denmark|Copenhagen|Europe|Danish|Danish krone|DK
Djibouti|Djibouti City|Africa|Somali|Djiboutian franc|DJ
Dominica|Roseau|North America|English|East Caribbean dollar|DM
the Dominican Republic|Santo Domingo|North America|Spanish|Dominican peso|DO
East Timor|Dili|Asia|Tetum|US dollar|TL
Ecuador|Quito|South America|Spanish|US dollar|EC
Egypt|Cairo|Africa|Arabic|Egyptian pound|EG
El Salvador|San Salvador|North America|Spanish|US dollar|SV
Eritrea|Asmara|Africa|Tigrinya|nakfa|ER
Estonia|Tallinn|Europe|Estonian|euro|EE
Eswatini|Mbabane|Africa|Swazi|lilangeni|SZ
Ethiopia|Addis Ababa|Africa|Amharic|birr|ET
Fiji|Suva|Oceania|Fijian|Fijian dollar|FJ
Finland|Helsinki|Europe|Finnish|euro|FI
France|Paris|Europe|French|euro|FR
Gabon|Libreville|Africa|French|Central African CFA franc|GA
the Gambia|Banjul|Africa|English|dalasi|GM
Georgia|Tbilisi|Asia|Georgian|lari|GE
Germany|Berlin|Europe|German|euro|DE
Ghana|Accra|Africa|English|cedi|GH
Greece|Athens|Europe|Greek|euro|GR
Grenada|Saint George's|North America|English|East Caribbean dollar|GD
Guatemala|Guatemala City|North America|Spanish|quetzal|GT
Guinea|Conakry|Africa|French|Guinean franc|GN
Guinea-Bissau|Bissau|Africa|Portuguese|West African CFA franc|GW
Guyana|Georgetown|South America|English|Guyanese dollar|GY
Haiti|Port-au-Prince|North America|Haitian Creole|gourde|HT
Honduras|Tegucigalpa|North America|Spanish|lempira|HN
Hungary|Budapest|Europe|Hungarian|forint|HU
Iceland|Reykjavík|Europe|Icelandic|Icelandic krona|IS
India|New Delhi|Asia|Hindi|Indian rupee|IN
Indonesia|Jakarta|Asia|Indonesian|rupiah|ID
Iran|Tehran|Asia|Persian|rial|IR
Iraq|Baghdad|Asia|Arabic|Iraqi dinar|IQ
Ireland|Dublin|Europe|English|euro|IE
Italy|Rome|Europe|Italian|euro|IT
Ivory Coast|Yamoussoukro|Africa|French|West African CFA franc|CI
Jamaica|Kingston|North America|English|Jamaican dollar|JM
Japan|Tokyo|Asia|Japanese|yen|JP
Jordan|Amman|Asia|Arabic|Jordanian dinar|JO
Kazakhstan|Astana|Asia|Kazakh|tenge|KZ
Kenya|Nairobi|Africa|Swahili|Kenyan shilling|KE
Kiribati|South Tarawa|Oceania|Gilbertese|Australian dollar|KI
Kuwait|Kuwait City|Asia|Arabic|Kuwaiti dinar|KW
Kyrgyzstan|Bishkek|Asia|Kyrgyz|som|KG
Laos|Vientiane|Asia|Lao|kip|LA
Latvia|Riga|Europe|Latvian|euro|LV
Lebanon|Beirut|Asia|Arabic|Lebanese pound|LB
Lesotho|Maseru|Africa|Sotho|loti|LS
Liberia|Monrovia|Africa|English|Liberian dollar|LR
Libya|Tripoli|Africa|Arabic|Libyan dinar|LY
Liechtenstein|Vaduz|Europe|German|Swiss franc|LI
Lithuania|Vilnius|Europe|Lithuanian|euro|LT
Luxembourg|Luxembourg City|Europe|Luxembourgish|euro|LU
Madagascar|Antananarivo|Africa|Malagasy|ariary|MG
Malawi|Lilongwe|Africa|Chichewa|Malawian kwacha|MW
Malaysia|Kuala Lumpur|Asia|Malay|ringgit|MY
the Maldives|Malé|Asia|Dhivehi|rufiyaa|MV
Mali|Bamako|Africa|Bambara|West African CFA franc|ML
Malta|Valletta|Europe|Maltese|euro|MT
the Marshall Islands|Majuro|Oceania|Marshallese|US dollar|MH
Mauritania|Nouakchott|Africa|Arabic|ouguiya|MR
Mauritius|Port Louis|Africa|Mauritian Creole|Mauritian rupee|MU
Mexico|Mexico City|North America|Spanish|Mexican peso|MX
Micronesia|Palikir|Oceania|English|US dollar|FM
Moldova|Chișinău|Europe|Romanian|Moldovan leu|MD
Monaco|Monaco|Europe|French|euro|MC
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik|MN
Montenegro|Podgorica|Europe|Montenegrin|euro|ME
Morocco|Rabat|Africa|Arabic|Moroccan dirham|MA
Mozambique|Maputo|Africa|Portuguese|metical|MZ
Myanmar|Naypyidaw|Asia|Burmese|kyat|MM
Namibia|Windhoek|Africa|English|Namibian dollar|NA
Nauru|Yaren|Oceania|Nauruan|Australian dollar|NR
Nepal|Kathmandu|Asia|Nepali|Nepalese rupee|NP
the Netherlands|Amsterdam|Europe|Dutch|euro|NL
New Zealand|Wellington|Oceania|English|New Zealand dollar|NZ
Nicaragua|Managua|North America|Spanish|córdoba|NI
Niger|Niamey|Africa|Hausa|West African CFA franc|NE
Nigeria|Abuja|Africa|English|naira|NG
North Korea|Pyongyang|Asia|Korean|North Korean won|KP
North Macedonia|Skopje|Europe|Macedonian|denar|MK
Norway|Oslo|Europe|Norwegian|Norwegian krone|NO
Oman|Muscat|Asia|Arabic|Omani rial|OM
Pakistan|Islamabad|Asia|Urdu|Pakistani rupee|PK
Palau|Ngerulmud|Oceania|Palauan|US dollar|PW
Panama|Panama City|North America|Spanish|balboa|PA
Papua New Guinea|Port Moresby|Oceania|Tok Pisin|kina|PG
Paraguay|Asunción|South America|Spanish|guaraní|PY
Peru|Lima|South America|Spanish|sol|PE
the Philippines|Manila|Asia|Filipino|Philippine peso|PH
Poland|Warsaw|Europe|Polish|złoty|PL
Portugal|Lisbon|Europe|Portuguese|euro|PT
Qatar|Doha|Asia|Arabic|Qatari riyal|QA
Romania|Bucharest|Europe|Romanian|Romanian leu|RO
Russia|Moscow|Europe|Russian|Russian ruble|RU
Rwanda|Kigali|Africa|Kinyarwanda|Rwandan franc|RW
Saint Kitts and Nevis|Basseterre|North America|English|East Caribbean dollar|KN
Saint Lucia|Castries|North America|English|East Caribbean dollar|LC
Saint Vincent and the Grenadines|Kingstown|North America|English|East Caribbean dollar|VC
Samoa|Apia|Oceania|Samoan|tala|WS
San Marino|City of San Marino|Europe|Italian|euro|SM
São Tomé and Príncipe|São Tomé|Africa|Portuguese|dobra|ST
Saudi Arabia|Riyadh|Asia|Arabic|Saudi riyal|SA
Senegal|Dakar|Africa|Wolof|West African CFA franc|SN
Serbia|Belgrade|Europe|Serbian|Serbian dinar|RS
the Seychelles|Victoria|Africa|Seychellois Creole|Seychellois rupee|SC
Sierra Leone|Freetown|Africa|Krio|leone|SL
Singapore|Singapore|Asia|English|Singapore dollar|SG
Slovakia|Bratislava|Europe|Slovak|euro|SK
Slovenia|Ljubljana|Europe|Slovene|euro|SI
the Solomon Islands|Honiara|Oceania|Pijin|Solomon Islands dollar|SB
Somalia|Mogadishu|Africa|Somali|Somali shilling|SO
South Africa|Pretoria|Africa|Zulu|rand|ZA
South Korea|Seoul|Asia|Korean|South Korean won|KR
South Sudan|Juba|Africa|English|South Sudanese pound|SS
Spain|Madrid|Europe|Spanish|euro|ES
Sri Lanka|Sri Jayawardenepura Kotte|Asia|Sinhala|Sri Lankan rupee|LK
Sudan|Khartoum|Africa|Arabic|Sudanese pound|SD
Suriname|Paramaribo|South America|Dutch|Surinamese dollar|SR
Sweden|Stockholm|Europe|Swedish|Swedish krona|SE
Switzerland|Bern|Europe|German|Swiss franc|CH
Syria|Damascus|Asia|Arabic|Syrian pound|SY
Tajikistan|Dushanbe|Asia|Tajik|somoni|TJ
Tanzania|Dodoma|Africa|Swahili|Tanzanian shilling|TZ
Thailand|Bangkok|Asia|Thai|baht|TH
Togo|Lomé|Africa|French|West African CFA franc|TG
Tonga|Nuku'alofa|Oceania|Tongan|pa'anga|TO
Trinidad and Tobago|Port of Spain|North America|English|Trinidad and Tobago dollar|TT
Tunisia|Tunis|Africa|Arabic|Tunisian dinar|TN
Turkey|Ankara|Asia|Turkish|lira|TR
Turkmenistan|Ashgabat|Asia|Turkmen|Turkmen manat|TM
Tuvalu|Funafuti|Oceania|Tuvaluan|Australian dollar|TV
Uganda|Kampala|Africa|English|Ugandan shilling|UG
Ukraine|Kyiv|Europe|Ukrainian|hryvnia|UA
the United Arab Emirates|Abu Dhabi|Asia|Arabic|dirham|AE
the United Kingdom|London|Europe|English|pound sterling|GB
the United States|Washington|North America|English|US dollar|US
Uruguay|Montevideo|South America|Spanish|Uruguayan peso|UY
Uzbekistan|Tashkent|Asia|Uzbek|Uzbek som|UZ
Vanuatu|Port Vila|Oceania|Bislama|vatu|VU
Venezuela|Caracas|South America|Spanish|bolívar|VE
Vietnam|Hanoi|Asia|Vietnamese|dong|VN
Yemen|Sana'a|Asia|Arabic|Yemeni rial|YE
Zambia|Lusaka|Africa|English|Zambian kwacha|ZM
Zimbabwe|Harare|Africa|Shona|Zimbabwe gold|ZW
"""

COUNTRIES = tuple(Country(*row.split("|")) for row in _TABLE.split("\n") if row)
